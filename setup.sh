#!/usr/bin/env bash
# Set up this checkout: a virtual environment in .venv, and a device that SAPIEN can render on. Safe to run again.
#
#   ./setup.sh                       what is there stays, what is missing gets installed (first time: 2 minutes, 7 GB)
#   PYTHON=python3.12 ./setup.sh     with this Python (3.10 to 3.13) instead of the first fitting one
#   sudo ./setup.sh system PKG...    only these system packages: the form asked for where we may not install them
#
# System packages come from apt, as root, and only if something does not work without them.
set -euo pipefail

MESA_NEEDED=24.3   # the first Mesa whose CPU renderer (lavapipe) has all that SAPIEN asks of a Vulkan device

# What the wheels of SAPIEN, OpenCV and the GPU drivers load from the system, and the package that has it.
LIBRARIES="libX11.so.6=libx11-6 libXext.so.6=libxext6 libGL.so.1=libgl1 libEGL.so.1=libegl1
           libgthread-2.0.so.0=libglib2.0-0 libvulkan.so.1=libvulkan1"

main() {
    cd "$(dirname "${BASH_SOURCE[0]}")"
    if [[ "${1:-}" == system ]]; then
        shift
        install_packages "$@"
        return
    fi
    [[ $# -eq 0 ]] || die "unknown argument '$1'; usage: ./setup.sh, or ./setup.sh system PKG..."
    install_python_packages
    find_render_device
}

say() { printf 'setup: %s\n' "$*"; }
die() {
    printf 'setup: error: %s\n' "$*" >&2
    exit 1
}

# ---------------------------------------------------------------- Python and its packages

install_python_packages() {
    local stamp=.venv/.packages-stamp key
    key=$({ cat pyproject.toml setup.sh; pwd; } | sha256sum)
    if [[ -x .venv/bin/python && "$(cat "$stamp" 2>/dev/null)" == "$key" ]]; then
        check_asked_version
        return
    fi
    make_venv
    # torch and torchvision in one command: picked one after the other they can come from builds that do not fit.
    say "installing torch and torchvision (a first time takes about a minute) ..."
    pip_install torch torchvision
    .venv/bin/python - <<'PY' || die "torch and torchvision do not fit together; delete .venv and run this again"
import torch, torchvision
boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.1]])
assert torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.5).tolist() == [0]
PY
    say "installing the other packages ..."
    ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 13))' || install_maniskill_by_parts
    pip_install -e '.[dev]'
    printf '%s\n' "$key" >"$stamp"
    say "packages are installed in .venv ($(.venv/bin/python --version))"
}

# ManiSkill asks for mplib 0.1.1, which has no build for Python 3.13 (the one Python of Debian 13). Only its motion
# planning examples import it, so there ManiSkill comes alone, followed by all else that it asks for.
# https://github.com/mani-skill/ManiSkill/issues/1405
install_maniskill_by_parts() {
    local parts
    say "Python 3.13: ManiSkill comes without its motion planner, mplib; pip will mention that, nothing here needs it"
    pip_install --no-deps 'mani-skill>=3.0.1'
    mapfile -t parts < <(.venv/bin/python - <<'PY'
from importlib.metadata import requires
print(*(part for part in requires("mani-skill") if "extra ==" not in part and "mplib" not in part), sep="\n")
PY
    )
    pip_install "${parts[@]}"
}

pip_install() {
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input "$@" </dev/null
}

fits() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

check_asked_version() {
    local version='import sys; print("%d.%d" % sys.version_info[:2])'
    [[ -z "${PYTHON:-}" || "$("$PYTHON" -c "$version")" == "$(.venv/bin/python -c "$version")" ]] ||
        die ".venv is $(.venv/bin/python --version), PYTHON=$PYTHON is another; delete .venv to change it"
}

make_venv() {
    if [[ -x .venv/bin/python ]] && fits .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1; then
        check_asked_version
        return
    fi
    local python
    python=$(pick_python) || {
        [[ -z "${PYTHON:-}" ]] || die "PYTHON=$PYTHON is not a Python 3.10 to 3.13 that runs"
        install_packages python3 python3-venv
        python=$(pick_python) || die "no Python 3.10 to 3.13 found; install one and name it: PYTHON=/path ./setup.sh"
    }
    # Debian and Ubuntu keep the part of venv that brings pip in a package of its own, one for each version.
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        install_packages "$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
}

pick_python() {
    local name
    for name in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if command -v "$name" >/dev/null && fits "$name"; then
            command -v "$name"
            return
        fi
    done
    return 1
}

# ---------------------------------------------------------------- a device to render on

find_render_device() {
    local stamp=.venv/.render-stamp key device lacking
    key=$(render_key)
    [[ "$(cat "$stamp" 2>/dev/null)" != "$key" ]] || return 0
    say "looking for a device to render on ..."
    # At most three rounds: as it is, with the shared libraries, with Mesa.
    for _ in 1 2 3; do
        device=$(render_device)
        lacking=$(lacking_packages "$device")
        [[ -n "$lacking" ]] || break
        [[ -z "$device" ]] || may_install || break
        # shellcheck disable=SC2086  # a list of package names
        install_packages $lacking
    done
    [[ -n "$device" ]] || die "SAPIEN cannot render here: $(render_frame cpu 2>&1 | tail -n 1).
    It needs the NVIDIA driver with its graphics libraries, or Mesa's CPU renderer (lavapipe) $MESA_NEEDED or newer."
    if [[ "$device" == cpu && -e /dev/nvidiactl ]]; then
        say "note: rendering on the CPU, SAPIEN cannot render on the NVIDIA GPU: $(render_frame cuda 2>&1 | tail -n 1)"
        say "      (a container needs NVIDIA_DRIVER_CAPABILITIES=all${lacking:+; packages that are missing: $lacking})"
    fi
    render_key >"$stamp"
    say "SAPIEN renders on: $device"
}

# What rendering depends on, so that another driver, or another machine with the same folder, is checked again.
render_key() {
    {
        cat setup.sh .venv/.packages-stamp
        mesa_version
        cat /proc/driver/nvidia/version 2>/dev/null || true
    } | sha256sum
}

# Prints the first device that renders a frame, nothing if there is none. A fresh process for each: one that has
# failed to find a Vulkan device does not look again, and a broken driver may take its process down.
render_device() {
    local device
    for device in cuda cpu; do
        if render_frame "$device" >/dev/null 2>&1; then
            echo "$device"
            return
        fi
    done
}

render_frame() {
    .venv/bin/python - "$1" <<'PY'
import sys
import cv2  # ManiSkill needs it, and it needs libraries of the system as the renderer does
import sapien

scene = sapien.Scene([sapien.physx.PhysxCpuSystem(), sapien.render.RenderSystem(sys.argv[1])])
scene.set_ambient_light([0.5, 0.5, 0.5])
scene.add_ground(0)
camera = scene.add_camera("camera", 32, 32, 1.0, 0.1, 10)
camera.set_entity_pose(sapien.Pose([-2, 0, 1]))
scene.update_render()
camera.take_picture()
assert camera.get_picture("Color")[..., :3].max() > 0.1, "the rendered frame is black"
PY
}

# Packages worth installing, given the device found so far: none once the best device of this machine renders.
lacking_packages() {
    local device=$1 entry known lacking=()
    if [[ "$device" == cuda ]] || [[ "$device" == cpu && ! -e /dev/nvidiactl ]]; then
        return
    fi
    known=$(PATH=$PATH:/sbin:/usr/sbin ldconfig -p)
    for entry in $LIBRARIES; do
        grep -qF "${entry%%=*} " <<<"$known" || lacking+=("${entry#*=}")
    done
    # With an NVIDIA GPU the driver renders; Mesa is the way out where it still cannot.
    if [[ ! -e /dev/nvidiactl || (-z "$device" && ${#lacking[@]} -eq 0) ]]; then
        new_enough "$(mesa_version)" || lacking+=(mesa-vulkan-drivers)
    fi
    echo "${lacking[*]}"
}

# ---------------------------------------------------------------- apt

may_install() { [[ $EUID -eq 0 ]] && command -v apt-get >/dev/null; }

install_packages() {
    command -v apt-get >/dev/null || die "missing: $* (names as in Debian); install them and run this again"
    may_install || die "system packages are missing; run this once, then go on:  sudo ./setup.sh system $*"
    say "installing system packages: $*"
    apt_get update || say "apt-get update complained; going on with the lists that are there"
    local package others=()
    for package in "$@"; do
        [[ "$package" == mesa-vulkan-drivers ]] || others+=("$package")
    done
    [[ ${#others[@]} -eq 0 ]] || apt_get install --no-install-recommends "${others[@]}"
    [[ ${#others[@]} -eq $# ]] || install_mesa
}

# Quiet: what apt and dpkg have to complain about comes on stderr.
apt_get() {
    DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 "$@" </dev/null >/dev/null
}

install_mesa() {
    local suite release=()
    if ! new_enough "$(mesa_candidate)"; then
        # Debian 12's own Mesa is too old, that of its backports is not. Other packages stay as they are: apt takes
        # from a backports suite only what it is asked to take.
        suite="$(. /etc/os-release && echo "${VERSION_CODENAME:-}")-backports"
        release=(-t "$suite")
        grep -qx 'ID=debian' /etc/os-release || die "Mesa here is $(mesa_candidate), needed is $MESA_NEEDED or newer"
        grep -qx "$suite" <<<"$(apt_sources '$(RELEASE)')" || add_suite "$suite"
        new_enough "$(mesa_candidate "${release[@]}")" || die "no Mesa $MESA_NEEDED or newer in this Debian or $suite"
    fi
    apt_get install --no-install-recommends "${release[@]}" mesa-vulkan-drivers
}

# Adds a suite of the archive that this machine's own apt sources name, so that a mirror stays the mirror.
add_suite() {
    local suite=$1 uri signed='' keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    uri=$(awk -v release="${suite%-backports}" '$1 == release && $2 == "main" { print $3; exit }' \
        <<<"$(apt_sources '$(RELEASE) $(COMPONENT) $(REPO_URI)')")
    [[ -n "$uri" ]] || die "apt's sources name no archive with ${suite%-backports}; add its $suite and run this again"
    [[ ! -e "$keyring" ]] || signed="[signed-by=$keyring] "
    say "adding $suite to apt's sources (/etc/apt/sources.list.d/rewardloop-backports.list)"
    printf '%s %s%s %s main\n' deb "$signed" "$uri" "$suite" >/etc/apt/sources.list.d/rewardloop-backports.list
    apt_get update || die "apt cannot read $suite from $uri"
}

apt_sources() { apt-get indextargets --format "$1" 'Created-By: Packages'; }
mesa_version() { dpkg-query -W -f '${Version}' mesa-vulkan-drivers 2>/dev/null || true; }
mesa_candidate() { apt-cache "$@" policy mesa-vulkan-drivers | awk '$1 == "Candidate:" { print $2 }'; }
new_enough() { [[ -n "$1" ]] && dpkg --compare-versions "$1" ge "$MESA_NEEDED"; }

main "$@"
