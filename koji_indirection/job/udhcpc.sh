#!/bin/sh
# What udhcpc runs when it has an address, in guests whose busybox came without such a script.
case $1 in
bound | renew) ;;
deconfig)
    ifconfig "$interface" up 2>/dev/null || ip link set dev "$interface" up
    exit 0
    ;;
*) exit 0 ;;
esac
ifconfig "$interface" "$ip" netmask "${subnet:-255.255.255.0}" 2>/dev/null ||
    ip addr add "$ip/${mask:-24}" dev "$interface"
for gateway in $router; do
    route add default gw "$gateway" dev "$interface" 2>/dev/null ||
        ip route add default via "$gateway" dev "$interface"
    break
done
if [ -n "$dns" ]; then
    [ -L /etc/resolv.conf ] && rm -f /etc/resolv.conf
    for server in $dns; do echo "nameserver $server"; done >/etc/resolv.conf
fi
