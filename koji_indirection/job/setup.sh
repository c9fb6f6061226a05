#!/bin/sh
# Prepares the guest for the commands, one step a call: network, media, repositories, packages or
# files; and `cleanup`, after the commands. Run by run.sh, with its output in the log of the job.
# A step that fails leaves one sentence in $REASON_FILE.

ROOT=
JOB=/etc/koji-indirection
. "$JOB/settings"
# Messages are looked at below, and must be those that are looked for.
LC_ALL=C DEBIAN_FRONTEND=noninteractive ZYPP_LOCK_TIMEOUT=300
export LC_ALL DEBIAN_FRONTEND ZYPP_LOCK_TIMEOUT

scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT

fail() {
    printf '%s\n' "$1" >"$REASON_FILE"
    printf '%s\n' "$1"
    exit 1
}

has() { command -v "$1" >/dev/null 2>&1; }

# Run a program; its output goes to the log and into $scratch/said. Returns its exit status.
run() {
    {
        "$@" 2>&1
        echo $? >"$scratch/status"
    } | tee "$scratch/said"
    read -r run_status <"$scratch/status"
    return "$run_status"
}

# Print the line of $scratch/said that says best what went wrong, without credentials.
complaint() {
    for pattern in "$@" '^E: ' '^Err' '^Error' '[Ee]rror' '[Ff]ailed' '.'; do
        grep -m 1 -e "$pattern" "$scratch/said" && break
    done | sed -e 's,//[^/@ ]*@,//,g' -e 's/^[[:space:]]*//' -e 's/^- //'
}

# --- network ----------------------------------------------------------------------------------

# Print the interfaces that are devices: not lo, nor a bridge or tunnel of the guest's own.
interfaces() {
    for interface in "$ROOT"/sys/class/net/*/device; do
        [ -e "$interface" ] || continue
        interface=${interface%/device}
        echo "${interface##*/}"
    done
}

# True when such an interface has an address: its network is in the table of routes.
has_address() {
    for interface in $(interfaces); do
        while read -r name destination _; do
            [ "$name" = "$interface" ] && [ "$destination" != 0000FEA9 ] && return 0
        done <"$ROOT/proc/net/route"
        [ -e "$ROOT/proc/net/if_inet6" ] || continue
        while read -r _ _ _ scope _ name; do
            [ "$name" = "$interface" ] && [ "$scope" = 00 ] && return 0
        done <"$ROOT/proc/net/if_inet6"
    done
    return 1
}

wait_for_address() {
    tries=0
    until has_address; do
        tries=$((tries + 1))
        [ "$tries" -gt "$1" ] && return 1
        sleep 1
    done
}

has_nameserver() {
    grep -q '^[[:space:]]*nameserver' "$ROOT/etc/resolv.conf" 2>/dev/null
}

# True when the guest has a program at work that configures interfaces.
is_configuring() {
    for comm in "$ROOT"/proc/[0-9]*/comm; do
        read -r program 2>/dev/null <"$comm" || continue
        case $program in
        NetworkManager | systemd-network | dhclient | dhcpcd | udhcpc | connmand | wicked* | ifup*)
            return 0
            ;;
        esac
    done
    return 1
}

link_up() {
    ip link set dev "$1" up 2>/dev/null || ifconfig "$1" up
}

# Ask for an address with each program that the guest has, until there is one.
ask_dhcp() {
    if has nmcli && nmcli device connect "$1" 2>/dev/null && wait_for_address 15; then return 0; fi
    if has dhclient; then dhclient -1 "$1" && wait_for_address 2 && return 0; fi
    if has dhcpcd; then dhcpcd -w -t 30 "$1" && wait_for_address 2 && return 0; fi
    if has udhcpc; then udhcpc -i "$1" -n -q -t 10 -s "$JOB/udhcpc" && wait_for_address 2 && return 0; fi
    if has networkctl && [ -d /run/systemd/system ]; then
        mkdir -p /run/systemd/network
        printf '[Match]\nName=%s\n[Network]\nDHCP=yes\n' "$1" \
            >/run/systemd/network/10-koji-indirection.network
        systemctl restart systemd-networkd && wait_for_address 30 && return 0
    fi
    return 1
}

# The addresses of qemu's user-mode network, which are always the same.
use_fixed_address() {
    [ "$NETWORK" = user ] || return 1
    if has ip; then
        ip addr add 10.0.2.15/24 dev "$1" && ip route add default via 10.0.2.2 dev "$1"
    else
        ifconfig "$1" 10.0.2.15 netmask 255.255.255.0 up && route add default gw 10.0.2.2 dev "$1"
    fi
    wait_for_address 2
}

step_network() {
    modprobe virtio_net 2>/dev/null
    tries=0
    while [ -z "$(interfaces)" ]; do
        tries=$((tries + 1))
        [ "$tries" -gt 10 ] && fail "the guest sees no network interface: it may lack the driver virtio_net"
        sleep 1
    done
    patience=2
    is_configuring && patience=30
    if ! wait_for_address "$patience"; then
        interface=$(interfaces | head -n 1)
        echo "the guest has configured no interface; doing so for $interface"
        link_up "$interface"
        ask_dhcp "$interface" || use_fixed_address "$interface" ||
            fail "the guest got no address on its network: it answers no DHCP request, or the guest has no program that asks"
    fi
    # What configures the interface writes down the name servers after the address; and an address
    # of IPv6 may have come by itself, long before it is done.
    tries=0
    while is_configuring && ! has_nameserver && [ "$tries" -lt 10 ]; do
        tries=$((tries + 1))
        sleep 1
    done
    if [ "$NETWORK" = user ] && ! has_nameserver; then
        [ -L "$ROOT/etc/resolv.conf" ] && rm -f "$ROOT/etc/resolv.conf"
        echo 'nameserver 10.0.2.3' >"$ROOT/etc/resolv.conf"
    fi
    if has ip; then ip -o addr; else ifconfig; fi
    cat "$ROOT/etc/resolv.conf" 2>/dev/null
    return 0
}

# --- media ------------------------------------------------------------------------------------

step_media() {
    mkdir -p "$INDIRECTION_MEDIA"
    run mount -t "$MEDIA_FS" -o ro "$MEDIA_DEVICE" "$INDIRECTION_MEDIA" ||
        fail "the media cannot be mounted from $MEDIA_DEVICE: $(complaint)"
    ls -l "$INDIRECTION_MEDIA"
}

# --- repositories -----------------------------------------------------------------------------

# Print dnf, zypper or apt, whichever this guest lives by; its program is then in $manager.
# Debian packages dnf, and Fedora packages apt: the one with the guest's own packages counts.
find_manager() {
    if has apt-get && [ -e "$ROOT/var/lib/dpkg/status" ]; then
        kind=apt manager=apt-get
    elif has zypper; then
        kind=zypper manager=zypper
    elif has dnf5; then
        kind=dnf manager=dnf5
    elif has dnf; then
        kind=dnf manager=dnf
    elif has yum; then
        kind=dnf manager=yum
    else
        kind='' manager=''
    fi
}

require_manager() {
    find_manager
    [ -n "$kind" ] || fail "the guest has no package manager that is supported: neither dnf, yum, zypper nor apt-get"
}

apt_get() {
    run apt-get -y -q -o DPkg::Lock::Timeout=300 -o Acquire::Retries=2 -o Acquire::http::Timeout=30 \
        -o Acquire::https::Timeout=30 -o Dpkg::Use-Pty=0 -o Dpkg::Options::=--force-confdef \
        -o Dpkg::Options::=--force-confold "$@"
}

# Where the file of a repository goes.
repository_path() {
    case $kind in
    apt) echo "$ROOT/etc/apt/sources.list.d/$1.list" ;;
    dnf) echo "$ROOT/etc/yum.repos.d/$1.repo" ;;
    zypper) echo "$ROOT/etc/zypp/repos.d/$1.repo" ;;
    esac
}

# Copy a file into place, and note it for `cleanup` if it is temporary.
install_file() {
    mkdir -p "${2%/*}"
    cat "$1" >"$2" || fail "$2 cannot be written"
    chmod 644 "$2"
    if [ "$3" = temporary ]; then echo "$2" >>"$JOB/temporary"; fi
}

# Fetch the metadata of one repository, and of no other.
refresh() {
    case $kind in
    apt)
        apt_get update -o Dir::Etc::sourcelist="$(repository_path "$1")" -o Dir::Etc::sourceparts=- \
            -o APT::Get::List-Cleanup=0 -o APT::Update::Error-Mode=any || return 1
        # Before 2.1 an index that cannot be fetched is no more than a warning. (A line with
        # Err alone means little: each way of compression is tried in turn.)
        ! grep -q -e 'Failed to fetch' "$scratch/said"
        ;;
    dnf) run "$manager" -y --disablerepo='*' --enablerepo="$1" makecache ;;
    zypper) run zypper --non-interactive refresh "$1" ;;
    esac
}

declared_repositories() {
    for name_file in "$JOB"/repositories/*.name; do
        [ -e "$name_file" ] || continue
        stem=${name_file%.name}
        IFS= read -r name <"$name_file"
        IFS= read -r id <"$stem.id"
        [ -e "$stem.$kind" ] ||
            fail "repository '$name' has a suite, as apt's have, but this guest's package manager is $manager"
        life=persisted
        [ -e "$stem.temporary" ] && life=temporary
        install_file "$stem.$kind" "$(repository_path "$id")" "$life"
        [ "$kind" = apt ] && [ -e "$stem.apt-conf" ] &&
            install_file "$stem.apt-conf" "$ROOT/etc/apt/apt.conf.d/90$id" "$life"
        echo "repository $name:"
        refresh "$id" ||
            fail "repository '$name' cannot be used: $(complaint 'Could not resolve' 'Could not connect' 'Error message' 'Curl error' 'Status code' 'on medium' 't be determined' 'Failed to fetch' '^W: ')"
    done
}

# Declare one repository of the media. $2 is the content of its file.
media_repository() {
    printf '%s\n' "$2" >"$scratch/media"
    install_file "$scratch/media" "$(repository_path "$1")" temporary
    echo "repository on the media: $(printf '%s' "$2" | grep -e '^deb ' -e '^baseurl=')"
    refresh "$1" || fail "the repository on the media cannot be used: $(complaint)"
}

# RPM metadata at the root of the media or up to two levels below it, as on a DVD.
media_rpm() {
    number=0
    for repomd in "$INDIRECTION_MEDIA"/repodata/repomd.xml "$INDIRECTION_MEDIA"/*/repodata/repomd.xml \
        "$INDIRECTION_MEDIA"/*/*/repodata/repomd.xml; do
        [ -e "$repomd" ] || continue
        number=$((number + 1))
        id=koji-indirection-media-$number
        media_repository "$id" "[$id]
name=media $number
baseurl=file://${repomd%/repodata/repomd.xml}
enabled=1
gpgcheck=0
repo_gpgcheck=0"
    done
}

# A pool with suites, or else a flat repository at the root or one level below it.
media_apt() {
    install_file "$JOB/apt-media.conf" "$ROOT/etc/apt/apt.conf.d/90koji-indirection-media" temporary
    number=0
    for release in "$INDIRECTION_MEDIA"/dists/*/Release "$INDIRECTION_MEDIA"/dists/*/InRelease; do
        [ -e "$release" ] || continue
        suite=${release%/*}
        # A suite has two such files, and on CDs more names.
        [ -e "$scratch/suite-${suite##*/}" ] || [ -L "$suite" ] && continue
        : >"$scratch/suite-${suite##*/}"
        components=
        for component in "$suite"/*/binary-*; do
            [ -d "$component" ] || continue
            component=${component%/*} component=${component##*/}
            case " $components " in *" $component "*) ;; *) components="$components $component" ;; esac
        done
        [ -n "$components" ] || continue
        number=$((number + 1))
        media_repository "koji-indirection-media-$number" \
            "deb [trusted=yes] file:$INDIRECTION_MEDIA ${suite##*/}$components"
    done
    [ "$number" -gt 0 ] && return
    for packages in "$INDIRECTION_MEDIA"/Packages "$INDIRECTION_MEDIA"/Packages.?z* \
        "$INDIRECTION_MEDIA"/*/Packages "$INDIRECTION_MEDIA"/*/Packages.?z*; do
        [ -e "$packages" ] || continue
        directory=${packages%/*}
        [ "$directory" = "${last_directory:-}" ] && continue
        last_directory=$directory
        number=$((number + 1))
        media_repository "koji-indirection-media-$number" "deb [trusted=yes] file:$directory ./"
    done
}

step_repositories() {
    if [ -d "$JOB/repositories" ]; then
        require_manager
        declared_repositories
    fi
    [ -n "$MEDIA_DEVICE" ] || return 0
    find_manager
    number=0
    case $kind in
    apt) media_apt ;;
    dnf | zypper) media_rpm ;;
    esac
    [ "$number" -gt 0 ] || echo "no repository for this guest is on the media"
}

# --- packages ---------------------------------------------------------------------------------

# Print those of the packages that the package manager has said are nowhere.
missing() {
    grep -e 'nable to locate' -e 'No match' -e 'o package' -e 'not found' -e 'not available' \
        -e 'no installation candidate' -e 'No provider' -e 'find any package' -e 'does not exist' \
        "$scratch/said" >"$scratch/missing"
    for package; do
        while IFS= read -r line; do
            case $line in
            *"nable to locate package $package" | *"Package $package is not available"* | \
                *"Package '$package' has no installation candidate"* | \
                *"find any package by glob '$package'"* | *"find any package by regex '$package'"* | \
                *"No match for argument: $package" | *"o package $package available"* | \
                *"'$package' not found"* | *"No provider of '$package' found"* | \
                *"Group ${package#@} does not exist"* | \
                *"Module or Group '${package#@}' "*)
                printf '%s\n' "$package"
                break
                ;;
            esac
        done <"$scratch/missing"
    done
}

# True when only what this job has declared can be reached.
is_offline() {
    [ -z "$NETWORK" ] && ls "$(repository_path 'koji-indirection-media-1')" >/dev/null 2>&1
}

install_packages() {
    case $kind in
    apt)
        if is_offline; then
            set -- -o Dir::Etc::sourcelist=/dev/null "$@"
            mkdir -p "$scratch/sources"
            cp "$ROOT"/etc/apt/sources.list.d/koji-indirection-*.list "$scratch/sources/"
            set -- -o Dir::Etc::sourceparts="$scratch/sources" "$@"
        else
            # The guest's own repositories: their indexes may be old or not there at all.
            apt_get update || echo "warning: not all of the guest's own repositories can be reached"
        fi
        apt_get install "$@"
        ;;
    dnf)
        is_offline && set -- --disablerepo='*' --enablerepo='koji-indirection-*' "$@"
        run "$manager" -y install "$@"
        ;;
    zypper)
        if is_offline; then
            for file in "$ROOT"/etc/zypp/repos.d/koji-indirection-media-*.repo; do
                file=${file##*/}
                set -- --repo "${file%.repo}" "$@"
            done
        fi
        run zypper --non-interactive install --auto-agree-with-licenses "$@"
        case $run_status in
        # Installed; but a reboot is advised, a repository was skipped, a script complained.
        102 | 103 | 106 | 107) return 0 ;;
        esac
        return "$run_status"
        ;;
    esac
}

step_packages() {
    require_manager
    set --
    while IFS= read -r package; do
        set -- "$@" "$package"
    done <"$JOB/packages"
    echo "$manager installs: $*"
    install_packages "$@"
    status=$?
    # yum installs what it finds, and calls that a success; dnf can be configured to do the same.
    [ "$status" -eq 0 ] && [ "$kind" != dnf ] && return 0
    nowhere=$(missing "$@" | sed "s/.*/'&'/" | tr '\n' ' ' | sed -e 's/ $//' -e "s/' '/', '/g")
    [ -z "$nowhere" ] || fail "no repository of the guest's has package $nowhere"
    [ "$status" -eq 0 ] && return 0
    fail "$manager cannot install $(printf "%s" "$*" | cut -c 1-100): $(complaint ' : Depends: ' ' : PreDepends: ' 'nothing provides' 'Failed to fetch')"
}

# --- files ------------------------------------------------------------------------------------

step_files() {
    for path_file in "$JOB"/files/*.path; do
        stem=${path_file%.path}
        IFS= read -r path <"$path_file"
        target=$ROOT$path
        echo "$path"
        [ -d "$target" ] && fail "file '$path' is a directory in the guest"
        mkdir -p "${target%/*}" || fail "the directory of file '$path' cannot be made"
        mode=
        [ -e "$target" ] || mode=0644
        [ -e "$stem.mode" ] && read -r mode <"$stem.mode"
        # Nobody may read what is not to be read, not even for a moment.
        (umask 077 && cat "$stem.data" >"$target") || fail "file '$path' cannot be written"
        if [ -e "$stem.owner" ]; then
            read -r owner <"$stem.owner"
            run chown "$owner" "$target" || fail "file '$path' cannot be given to $owner: $(complaint)"
        fi
        # After chown, which takes setuid away.
        [ -z "$mode" ] || chmod "$mode" "$target" || fail "file '$path' cannot get mode $mode"
        rm -f "$stem.data"
    done
}

# --- after the commands -----------------------------------------------------------------------

step_cleanup() {
    [ -e "$JOB/temporary" ] || return 0
    while IFS= read -r file; do
        rm -f "$file"
    done <"$JOB/temporary"
}

case $1 in
network | media | repositories | packages | files | cleanup) "step_$1" ;;
*) fail "there is no step $1" ;;
esac
