#!/usr/bin/env bash
# migrate.sh VM QMP HOST:PORT: moves a guest by pagecopyd's API, as an orchestrator would, with curl and nothing else.
# PAGECOPY_API is the API's socket. Ends as `pagecopy migrate` does: 0 moved, 1 failed, 3 cancelled, 4 in doubt.
set -euo pipefail
api=${PAGECOPY_API:-/run/pagecopy/api.sock}
(($# == 3)) || { sed -n '2,3s/^# //p' "$0" >&2; exit 2; }

call() { curl --silent --show-error --unix-socket "$api" "$@"; }
# A member of a JSON object on one line that is a text; enough for what is looked at here.
member() { sed -nE "s/.*\"$1\":\"((\\\\.|[^\"\\\\])*)\".*/\1/p" | sed -E 's/\\(["\\])/\1/g'; }
quoted() { local text=${1//\\/\\\\}; printf '"%s"' "${text//\"/\\\"}"; }

# Whatever becomes of the answer, the request with this key begins one migration: it is sent until it is answered.
key=$(</proc/sys/kernel/random/uuid)
body="{\"vm\":$(quoted "$1"),\"qmp\":$(quoted "$2"),\"to\":$(quoted "$3")}"
answer=$(call --retry 5 --retry-connrefused --header "Idempotency-Key: $key" --json "$body" http://localhost/v1/migrations)
id=$(member id <<<"$answer")
if [[ -z $id ]]; then
    echo "refused: $(member detail <<<"$answer")" >&2
    echo "what to do: $(member remedy <<<"$answer")" >&2
    exit 1
fi
echo "migration $id"

# Its events, up to the end. Cut off, the list of what was comes again with the next connection.
status=
while true; do
    while read -r line; do
        case $line in
            *'"event":"round"'*) echo "round: $(member decision <<<"$line")" ;;
            *'"event":"state"'*) member state <<<"$line" ;;
            *'"event":"finished"'*) status=$(member status <<<"$line") end=$line ;;
        esac
    done < <(call --no-buffer "http://localhost/v1/migrations/$id/events")
    # A daemon that was started anew knows it by its journal, or not at all.
    [[ -z $status ]] || break
    sleep 1
    code=$(call --output /dev/null --write-out '%{http_code}' "http://localhost/v1/migrations/$id") || continue
    [[ $code != 404 ]] || { echo "it never began" >&2; exit 1; }
done
echo "$status: $(member error <<<"$end")"
case $status in
    completed) exit 0 ;;
    cancelled) exit 3 ;;
    in-doubt) exit 4 ;;
    *) exit 1 ;;
esac
