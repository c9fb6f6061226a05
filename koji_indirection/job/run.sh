#!/bin/sh
# Runs the job inside the utility guest: set-up steps, each command in turn, then power off.
# Or a shell in place of the commands, for whoever wants to try them by hand.
#
# POSIX sh and what every system has; nothing is installed in the guest. Reports
# go to the host over virtio-serial ports, one JSON object a line; the output of
# the commands goes over a second port. The console is left alone: a getty may
# hang it up at any time.

JOB=/etc/koji-indirection
. "$JOB/settings"

# A guest that reboots must not run the job twice; the host calls a reboot a failure.
[ -e "$JOB/started" ] && exit 0
mount -o remount,rw / 2>/dev/null
touch "$JOB/started" 2>/dev/null

PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
HOME=/root USER=root LOGNAME=root TERM=dumb
LANG=C.UTF-8
case $(locale -a 2>/dev/null) in
'' | *C.[uU][tT][fF]*8*) ;;
*) LANG=en_US.UTF-8 ;; # RHEL 7 has no C.UTF-8
esac
export PATH HOME USER LOGNAME TERM LANG
umask 022
cd /

# Print the disk with this serial number, whatever bus it is on.
disk() {
    for block in /sys/block/*; do
        serial=
        if [ -r "$block/serial" ]; then
            read -r serial <"$block/serial"
        elif [ -r "$block/device/vpd_pg80" ]; then # SATA: binary, and padded
            serial=$(tr -cd a-z <"$block/device/vpd_pg80" 2>/dev/null)
        fi
        [ "$serial" = "$1" ] && echo "/dev/${block##*/}" && return 0
    done
    for link in /dev/disk/by-id/*[-_]"$1"; do
        [ -b "$link" ] && readlink -f "$link" && return 0
    done
    return 1
}

# A disk has its virtio name on every bus: templates may name it, and its partition. The
# variables have another one there, by what the disk is and not by where it was found.
by_id=/dev/disk/by-id/indirection
workspace_name=$WORKSPACE
INDIRECTION_WORKSPACE=$WORKSPACE INDIRECTION_INPUT=$INPUT INDIRECTION_RESULTS_DIR=$RESULTS_DIR
for entry in $DISKS; do
    name=${entry%:*}
    [ ! -e "$name" ] || continue
    found=$(disk "${entry#*:}")
    if [ -z "$found" ]; then # a kernel too old to tell serial numbers: the order is the same
        for other in sd hd; do
            [ -b "/dev/$other${name#/dev/vd}" ] && found=/dev/$other${name#/dev/vd}
        done
    fi
    [ -n "$found" ] || continue
    mkdir -p "${by_id%/*}"
    for new in "$name" "$by_id-${entry#*:}"; do
        ln -s "$found" "$new"
    done
    if [ -b "${found}1" ]; then
        ln -s "${found}1" "${name}1"
        ln -s "${found}1" "$by_id-${entry#*:}-part1"
    fi
    [ "${name}1" != "$workspace_name" ] ||
        WORKSPACE=${found}1 INDIRECTION_WORKSPACE=$by_id-workspace-part1
    [ "$name" != "$INPUT" ] || INDIRECTION_INPUT=$by_id-input
done

# What templates and set-up steps may rely on; then a proxy, if the guest has a network.
export INDIRECTION_WORKSPACE INDIRECTION_INPUT INDIRECTION_RESULTS_DIR
if [ -n "$MEDIA_DEVICE" ]; then
    INDIRECTION_MEDIA=/run/koji-indirection-media
    export INDIRECTION_MEDIA
fi
. "$JOB/environment"

power_off() {
    if [ -d /run/systemd/system ]; then
        systemctl --force poweroff && sleep 60
    fi
    umount -a -r 2>/dev/null
    poweroff -f || halt -f -p || echo o >/proc/sysrq-trigger
    sleep 60
}

# Print the device of the virtio-serial port with this name; where a shell is to run, the log's
# is a terminal.
port() {
    if [ -n "$SHELL_TTY" ] && [ "$1" = "$LOG_PORT" ]; then
        [ -c "$SHELL_TTY" ] && echo "$SHELL_TTY"
        return
    fi
    if [ -e "/dev/virtio-ports/$1" ]; then
        echo "/dev/virtio-ports/$1"
        return 0
    fi
    for name_file in /sys/class/virtio-ports/*/name; do
        [ -e "$name_file" ] || continue
        read -r port_name <"$name_file"
        if [ "$port_name" = "$1" ]; then
            port_dir=${name_file%/name}
            [ -c "/dev/${port_dir##*/}" ] && echo "/dev/${port_dir##*/}" && return 0
        fi
    done
    return 1
}

if [ -n "$STATUS_TTY" ]; then
    status_port=$STATUS_TTY log_port=$LOG_TTY
    for tty in "$STATUS_TTY" "$LOG_TTY"; do
        stty -F "$tty" 115200 raw -echo clocal
    done
fi

tries=0
until [ -n "$STATUS_TTY" ] || { status_port=$(port "$STATUS_PORT") && log_port=$(port "$LOG_PORT"); }; do
    [ "$tries" -eq 0 ] && modprobe virtio_console 2>/dev/null
    tries=$((tries + 1))
    if [ "$tries" -gt 60 ]; then
        echo "koji-indirection: this guest has no virtio-serial ports" >/dev/console
        power_off
    fi
    sleep 1
done

# With pvpanic the host learns of a kernel panic even when the console is silent.
modprobe pvpanic 2>/dev/null
modprobe pvpanic-mmio 2>/dev/null

# A port can be opened only once, and many tools open /dev/stdout or /dev/stderr
# again; so commands write to a pipe, and one `cat` carries it to the port.
command exec 3>"$status_port" || power_off
pipe_dir=$(mktemp -d /run/koji-indirection.XXXXXX 2>/dev/null || mktemp -d)
mkfifo "$pipe_dir/log"
cat "$pipe_dir/log" >"$log_port" &
pump=$!
exec 4>"$pipe_dir/log"

# A pump that dies must not take the runner with it.
trap '' PIPE

report() { printf '%s\n' "$1" >&3; }

# Hundredths of a second since boot.
now() {
    read -r uptime _ </proc/uptime
    echo $((${uptime%.*} * 100 + 1${uptime#*.} - 100))
}

seconds_since() {
    elapsed=$(($(now) - $1))
    printf '%d.%02d' $((elapsed / 100)) $((elapsed % 100))
}

# Print the used bytes of the file system at a directory, and those that can be used in all: what it
# keeps for itself is neither. 0 if that cannot be told.
# stat asks for them without opening the directory, as df does: a command may be unmounting it.
space() {
    stat -f -c '%b %f %a %S' "$1" 2>/dev/null | {
        read -r blocks free available block_bytes || blocks=0 free=0 available=0 block_bytes=0
        echo "$(((blocks - free) * block_bytes)) $(((blocks - free + available) * block_bytes))"
    }
}

sample() {
    total=0 available=0
    while read -r key value _; do
        case $key in
        MemTotal:) total=$value ;;
        MemAvailable:) available=$value ;;
        esac
    done </proc/meminfo
    # Since boot; kernels before 4.13 do not count them.
    oom_kills=$(sed -n 's/^oom_kill //p' /proc/vmstat)
    workspace='0 0'
    while read -r device directory _; do
        case $device in "$WORKSPACE" | "$workspace_name" | "$INDIRECTION_WORKSPACE") ;; *) continue ;; esac
        workspace=$(space "$directory") && break
    done </proc/mounts
    root=$(space /)
    report "{\"event\":\"sample\",\"memory_bytes\":$(((total - available) * 1024)),\"root_bytes\":${root% *},\"workspace_bytes\":${workspace% *},\"workspace_size_bytes\":${workspace#* },\"oom_kills\":${oom_kills:-0}}"
}

# Commands are run by root's login shell, as Image Factory's ssh did.
command_shell=/bin/sh
while IFS=: read -r account _ _ _ _ _ login_shell; do
    [ "$account" = root ] || continue
    case ${login_shell##*/} in
    bash | dash | sh | ash | ksh | mksh | zsh) [ -x "$login_shell" ] && command_shell=$login_shell ;;
    esac
done </etc/passwd

selinux=none
if [ -e /sys/fs/selinux/enforce ]; then
    read -r enforcing </sys/fs/selinux/enforce
    [ "$enforcing" = 1 ] && selinux=enforcing || selinux=permissive
fi
kernel=$(uname -r | tr -cd 'A-Za-z0-9._+~-')
report "{\"event\":\"job-started\",\"kernel\":\"$kernel\",\"shell\":\"$command_shell\",\"selinux\":\"$selinux\"}"

(while :; do
    sample
    sleep "$SAMPLE_SECONDS"
done) </dev/null >/dev/null 2>&1 4>&- &

# What kind of set-up step went wrong, and how, is one line that the step leaves behind.
REASON_FILE=$pipe_dir/reason
export REASON_FILE
status=0
for step in $SETUP; do
    echo "=== setup: $step" >&4
    report "{\"event\":\"setup-started\",\"step\":\"$step\"}"
    started=$(now)
    : >"$REASON_FILE"
    (trap - PIPE && exec /bin/sh "$JOB/setup" "$step") </dev/null >&4 2>&1 3>&- 4>&-
    status=$?
    took=$(seconds_since "$started")
    reason=$(head -n 1 "$REASON_FILE" | cut -c 1-500 | tr -d '"\\' | tr -cd ' -~')
    printf '=== exit status %d after %s s\n' "$status" "$took" >&4
    report "{\"event\":\"setup-ended\",\"step\":\"$step\",\"status\":$status,\"seconds\":$took,\"reason\":\"$reason\"}"
    [ "$status" -eq 0 ] || break
done
reason_file=$REASON_FILE
unset REASON_FILE

set -- "$JOB"/commands/*.cmd
if [ -n "$SHELL_TTY" ]; then
    # In a session of its own: a shell with job control takes the terminal for its session's.
    $(command -v setsid) /bin/sh "$JOB/shell" "$command_shell" "$status" 3>&- 4>&-
    set -- # none but those that somebody has run there
fi

index=0
for command in "$@"; do
    [ "$status" -eq 0 ] || break
    index=$((index + 1))
    cat "${command%.cmd}.head" >&4
    report "{\"event\":\"command-started\",\"index\":$index}"
    started=$(now)
    read -r first_line <"$command"
    case $first_line in
    '#!'*) (trap - PIPE && exec "$command") </dev/null >&4 2>&1 3>&- 4>&- ;;
    *) (trap - PIPE && exec "$command_shell" "$command") </dev/null >&4 2>&1 3>&- 4>&- ;;
    esac
    status=$?
    took=$(seconds_since "$started")
    printf '=== exit status %d after %s s\n' "$status" "$took" >&4
    report "{\"event\":\"command-ended\",\"index\":$index,\"status\":$status,\"seconds\":$took}"
done

# Repositories that are not persisted go before the job ends, whatever came of it.
if [ -e "$JOB/setup" ]; then
    REASON_FILE=$reason_file /bin/sh "$JOB/setup" cleanup </dev/null >/dev/null 2>&1 3>&- 4>&-
fi

# Close the log and write everything to the disks. A daemon that a command left behind may
# hold the log open, a device that it left suspended may block sync: wait for neither for ever.
exec 4>&-
sync &
syncing=$!
tries=0
while sleep 1; do
    tries=$((tries + 1))
    [ "$tries" -lt 5 ] && kill -0 "$pump" 2>/dev/null && continue
    [ "$tries" -lt 120 ] && kill -0 "$syncing" 2>/dev/null && continue
    break
done

sample
report "{\"event\":\"job-ended\",\"status\":$status}"
# Unlike a virtio port, a serial one still has the last words when it has taken them.
[ -z "$STATUS_TTY" ] || { stty -F "$STATUS_TTY" raw && sleep 1; }
power_off
