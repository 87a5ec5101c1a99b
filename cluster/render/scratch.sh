# Mounts the instance's NVMe disks as one file system at /scratch, for the clip cache. Running it again changes nothing.
set -eu
for _ in $(seq 60); do # Amazon's Deep Learning AMIs combine and mount them by themselves, soon after the start
    if [ ! -d /opt/dlami ] || mountpoint --quiet /opt/dlami/nvme; then break; fi
    sleep 1
done
sudo mkdir -p /scratch
if ! mountpoint --quiet /scratch; then
    disks=$(lsblk --noheadings --nodeps --paths --output NAME,MODEL | awk '/Amazon EC2 NVMe Instance Storage/ { print $1 }')
    made=$(lsblk --noheadings --list --paths --output NAME,LABEL | awk '$2 == "erann-scratch" { print $1; exit }')
    if mountpoint --quiet /opt/dlami/nvme; then
        sudo mount --bind /opt/dlami/nvme /scratch
    elif [ -n "$made" ]; then # formatted before a restart of the instance
        sudo mount -o noatime "$made" /scratch
    elif [ -n "$disks" ]; then
        device=$disks
        if [ "$(echo "$disks" | wc -l)" -gt 1 ]; then
            device=/dev/md/scratch
            # shellcheck disable=SC2086 # one word per disk
            sudo mdadm --create "$device" --run --level=0 --raid-devices="$(echo "$disks" | wc -l)" $disks
        fi
        sudo mkfs.ext4 -q -m 0 -L erann-scratch "$device"
        sudo mount -o noatime "$device" /scratch
    else
        echo "no NVMe disk of its own on this instance: the clip cache would fill the root disk" >&2
        exit 1
    fi
fi
sudo chown "$(id -u):$(id -g)" /scratch
