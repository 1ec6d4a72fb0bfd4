# What demo.sh, loop.sh and bitewings.sh begin with: `source` it. The folder for all results is the only argument
# of such a script, or by default named like it; it must be new.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-$(basename "$0" .sh)}
if [ -e "$out" ]; then
    echo "error: $out exists: remove it, or name another folder" >&2
    exit 2
fi
unset OPENAI_LOGDIR

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}
