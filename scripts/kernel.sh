# A Debian kernel for machines that are emulated, and initramfses for it. Sourced after lib.sh, never run.
#
# The kernel and its busybox are Debian's packages, fetched through a private apt directory into the cache and never
# installed. $kernel is the folder: vmlinux, the kernel unpacked, and root, with its modules and busybox.

# use_kernel VERSION: from here on that is the kernel: 6.12, what Debian 12 and 13 run, or the newest of Debian's backports, whose
# soft-RoCE knows network namespaces and on-demand paging (seen with 7.3).
use_kernel() {
    kernel_version=$1
    case $kernel_version in
        6.12) suite=bookworm-backports ;;
        newest) suite=trixie-backports ;;
        *) die "no kernel $kernel_version: 6.12 and newest are known" ;;
    esac
    kernel=$cache/vm-$suite
}
use_kernel 6.12

# provide_kernel: makes the folder, if it is not there.
provide_kernel() {
    [[ ! -e $kernel/vmlinux ]] || return 0
    have zstd || die "zstd is missing: run scripts/install"
    say "fetching the $kernel_version kernel of $suite"
    # Two scripts may do this at once: each builds under a name of its own, and one is the quicker.
    local new=$kernel.new.$$
    mkdir -p "$new"
    fetch_kernel "$new"
    mv -T "$new" "$kernel" 2>/dev/null || [[ -e $kernel/vmlinux ]]
    rm -rf "$new"
}

# fetch_kernel DIR: downloads the suite's newest (of that version) and unpacks it: DIR/root, DIR/vmlinux.
fetch_kernel() {
    local dir=$1 package packages piece deb folder
    private_apt "$dir/apt" "${suite%-backports}" "$suite"
    apt_options+=(-o "APT::Default-Release=$suite")
    package=$(apt-cache "${apt_options[@]}" depends linux-image-amd64 | sed -n 's/.*Depends: \(linux-image-[^ ]*\).*/\1/p')
    [[ $package == linux-image-* && ($kernel_version == newest || $package == linux-image-"$kernel_version".*) ]] ||
        die "$suite has '$package' and no kernel $kernel_version"
    packages=("$package" busybox-static)
    # Later ones come in pieces.
    for piece in binary modules; do
        piece=${package/image/$piece}
        ! apt-cache "${apt_options[@]}" show "$piece" >/dev/null 2>&1 || packages+=("$piece")
    done
    (cd "$dir/apt" && apt-get "${apt_options[@]}" download "${packages[@]}" >&2)
    for deb in "$dir"/apt/*.deb; do
        dpkg -x "$deb" "$dir/root"
    done
    rm -rf "$dir/apt"
    for folder in bin lib; do
        [[ -e $dir/root/$folder ]] || ln -s "usr/$folder" "$dir/root/$folder"
    done
    unpack_kernel "$(find "$dir/root" -name 'vmlinuz*' | head -n 1)" >"$dir/vmlinux"
    "$dir/root/bin/busybox" depmod -b "$dir/root" "$(basename "$dir"/root/lib/modules/*)"
}

# unpack_kernel BZIMAGE: prints the ELF file in it, which boots without being unpacked in the emulation first. Where it
# is, and how long with the four bytes of its size behind it, the header says (Documentation/arch/x86/boot.rst).
unpack_kernel() {
    local sectors offset length
    sectors=$(od -An -tu1 -j $((0x1f1)) -N 1 "$1")
    read -r offset length < <(od -An -tu4 -j $((0x248)) -N 8 "$1")
    head -c $(((sectors + 1) * 512 + offset + length - 4)) "$1" | tail -c $((length - 4)) | zstd -dcq
}

# needed MODULES-DEP MODULE...: prints the file of each module and of all that they need.
needed() {
    local list=$1 module
    shift
    for module in "$@"; do
        # Names are written with _ or -, and a line is "FILE: ALL THAT IT NEEDS".
        grep -E "^[^:]*/${module//_/[_-]}\.ko" "$list" | tr -d : || die "the kernel has no module $module"
    done | tr ' ' '\n' | sort -u
}

# add_base TREE INIT MODULE...: puts busybox, the modules and the first process into the tree of an initramfs.
add_base() {
    local tree=$1 init=$2 busybox=$kernel/root/bin/busybox version source files file
    shift 2
    version=$(basename "$kernel"/root/lib/modules/*)
    source=$kernel/root/lib/modules/$version
    mkdir -p "$tree"/{bin,sbin,proc,dev}
    cp "$busybox" "$tree/bin/busybox"
    ln -s /bin/busybox "$tree/sbin/modprobe"
    install -m 755 "$init" "$tree/init"
    files=$(needed "$source/modules.dep" "$@")
    for file in $files; do
        mkdir -p "$tree/lib/modules/$version/$(dirname "$file")"
        "$busybox" xz -dc "$source/$file" >"$tree/lib/modules/$version/${file%.xz}"
    done
    "$busybox" depmod -b "$tree" "$version"
}

# pack TREE FILE: makes the initramfs, whole or not at all.
pack() {
    (cd "$1" && find . | "$kernel/root/bin/busybox" cpio -o -H newc) >"$2.new.$$" 2>/dev/null
    mv "$2.new.$$" "$2"
}

# initramfs_of NAME FILE WORD...: the path of an initramfs; another one for other files or words.
initramfs_of() {
    local name=$1 file=$2
    shift 2
    echo "$kernel/$name-$(cat "$file" "$root/scripts/kernel.sh" - <<<"$*" | sha256sum | cut -c1-16)"
}
