# What the launchers share; they source it.
# shellcheck shell=bash

dry_run=""
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Bad input, as everywhere in this project: one line that names the thing and the fix, status 2.
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# Words as a shell reads them back, on one line.
quoted() {
    local words
    printf -v words '%q ' "$@"
    printf '%s\n' "${words% }"
}

# Run a command, or with --dry-run print it.
run() {
    if [[ $dry_run ]]; then quoted "$@"; else "$@"; fi
}

# COMMAND FIX: that what is to be run is installed, which a dry run does not need.
require_command() {
    [[ $dry_run ]] || command -v "$1" >/dev/null || fail "$1 is not installed; $2"
}

# OPTION [VALUE ...]: that an option's value follows it.
require_value() {
    [[ -n ${2-} && $2 != -- ]] || fail "$1 needs a value; see --help"
}

# OPTION VALUE: that an option was given.
require_option() {
    [[ -n $2 ]] || fail "$1 is missing; see --help"
}

unknown() {
    fail "unknown argument '$1'; the arguments of training come after --; see --help"
}

# The arguments of training: what it would refuse is refused before anything is paid for. Sets
# `recipe`.
require_training() {
    local word previous="" workdir=""
    recipe=""
    for word in "$@"; do
        case $previous in
        --config) recipe=$word ;;
        --workdir) workdir=$word ;;
        esac
        case $word in
        --config=*) recipe=${word#*=} ;;
        --workdir=*) workdir=${word#*=} ;;
        esac
        previous=$word
    done
    [[ $recipe ]] || fail "--config FILE.py is missing among the arguments of training, after --"
    [[ $workdir ]] || fail "--workdir DIR is missing among the arguments of training, after --"
}

# Sets `revision` to the checkout as git knows it, uncommitted changes included: that is what is
# sent to other machines.
require_revision() {
    command -v git >/dev/null || fail "git is not installed; install it"
    git -C "$root" rev-parse --quiet --verify HEAD >/dev/null 2>&1 ||
        fail "$root is not a git checkout, and only that is sent; clone the repository"
    revision=$(git -C "$root" stash create)
    revision=${revision:-$(git -C "$root" rev-parse HEAD)}
    git -C "$root" cat-file -e "$revision:$recipe" 2>/dev/null ||
        fail "$recipe is not in git, and only that is sent; git add it, and name it from $root"
}
