#!/usr/bin/env bash
# From a fresh clone to a steered answer: installs, makes the demo model, starts the server, asks it one question with
# three strengths of the delta that ships with the package, and leaves the server running.
#
#   bash deploy/quickstart.sh           do all that; with the server still running, only ask again
#   bash deploy/quickstart.sh --stop    stop the server
#   bash deploy/quickstart.sh --check   do all that and stop the server at the end
#
# CMC_SERVER_HOST, CMC_SERVER_PORT    where to listen (127.0.0.1, 8000)
# CMC_SERVER_VENV                     the virtual environment (.venv in the repository)
# CMC_SERVER_CACHE                    where the converted model is kept (~/.cache/cmc-server)
# CMC_SERVER_STATE                    where the log and the process id are kept (.quickstart in the repository)
# and those of deploy/install.sh
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
host=${CMC_SERVER_HOST:-127.0.0.1}
port=${CMC_SERVER_PORT:-8000}
venv=${CMC_SERVER_VENV:-$repo/.venv}
state=${CMC_SERVER_STATE:-$repo/.quickstart}
log=$state/server.log
pid_file=$state/server.pid
delta=$repo/cmc_server/demo/concise
reach=$host
[[ $host == 0.0.0.0 ]] && reach=127.0.0.1
url=http://$reach:$port

say() { printf 'cmc-server: %s\n' "$*" >&2; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# The process that this script started, if it still runs. A process id alone may meanwhile be someone else's, and vLLM
# renames its processes; but the server works in the state folder.
server_pid() {
    local pid
    [[ -e $pid_file ]] || return 1
    pid=$(cat "$pid_file")
    [[ $(readlink "/proc/$pid/cwd") == "$(cd "$state" && pwd -P)" ]] && echo "$pid"
}

stop_server() {
    local pid second
    if ! pid=$(server_pid); then
        say "no server of this script is running"
        rm -f "$pid_file"
        return
    fi
    say "stopping the server (process $pid)"
    kill -TERM "$pid"
    for ((second = 0; second < 60; second++)); do
        kill -0 "$pid" 2>/dev/null || break
        sleep 1
    done
    # The server leads its own process group, so that nothing it started can be left behind.
    kill -KILL -- "-$pid" 2>/dev/null || true
    rm -f "$pid_file"
}

check_port() {
    "$python" - "$reach" "$port" <<'PYTHON' || die "port $port is in use on $reach; free it or choose another: CMC_SERVER_PORT=8001 bash deploy/quickstart.sh"
import socket, sys

with socket.socket() as probe:
    probe.settimeout(2)
    sys.exit(probe.connect_ex((sys.argv[1], int(sys.argv[2]))) == 0)
PYTHON
}

start_server() {
    local model options=(--host "$host" --port "$port" --max-model-len 2048 --delta-memory 1)
    check_port
    model=$("$python" -m cmc_server.demo.models smollm2)
    if [[ $(cat "$venv/.cmc-server-engine") == cpu ]]; then
        # A small cache, and no compilation: it would need a C++ compiler and pays only for larger models.
        export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
        options+=(--enforce-eager)
    else
        options+=(--gpu-memory-utilization 0.5)
    fi
    export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=${VLLM_NO_USAGE_STATS:-1}
    mkdir -p "$state"
    say "starting the server on $url; its log is $log"
    (
        cd "$state"
        exec setsid cmc-server serve "$model" --served-model-name smollm2 --delta "concise=$delta" "${options[@]}"
    ) >"$log" 2>&1 </dev/null &
    echo $! >"$pid_file"
    echo "$url" >"$state/server.url"
}

wait_for_server() {
    local pid
    pid=$(cat "$pid_file")
    if ! "$python" -m cmc_server.demo.ask wait "$url" --pid "$pid" --log "$log"; then
        say "the end of its log:"
        tail -n 40 "$log" >&2
        exit 1
    fi
}

show_next() {
    cat <<TEXT

The server runs on $url (log: $log). Next:

  curl $url/v1/chat/completions -H 'Content-Type: application/json' -d '{
    "model": "smollm2", "temperature": 0, "messages": [{"role": "user", "content": "Why is the sky blue?"}],
    "cmc": {"deltas": [{"name": "concise", "strength": 1.2}]}}'

  $python - <<'PYTHON'
from openai import OpenAI
client = OpenAI(base_url="$url/v1", api_key="none")
question = [{"role": "user", "content": "Why is the sky blue?"}]
steering = {"cmc": {"deltas": [{"name": "concise", "strength": 1.2}]}}
answer = client.chat.completions.create(model="smollm2", messages=question, extra_body=steering)
print(answer.choices[0].message.content)
PYTHON

  bash deploy/quickstart.sh --stop
TEXT
}

mode=${1:-run}
case $mode in
    run | --check) [[ $# -le 1 ]] || die "the usage is: bash deploy/quickstart.sh [--check | --stop]" ;;
    --stop)
        stop_server
        exit
        ;;
    *) die "unknown option $mode; the usage is: bash deploy/quickstart.sh [--check | --stop]" ;;
esac

bash "$repo/deploy/install.sh" "$venv"
venv=$(cd "$venv" && pwd)
python=$venv/bin/python
export PATH=$venv/bin:$PATH
finished=false
if server_pid >/dev/null; then
    finished=true
    url=$(cat "$state/server.url")
    say "a server of this script already runs on $url"
else
    trap 'if ! $finished && server_pid >/dev/null; then stop_server; fi' EXIT
    trap 'exit 130' INT TERM
    start_server
fi
wait_for_server
"$python" -m cmc_server.demo.ask compare "$url" --model smollm2 --delta concise --strengths 0 1 2
if [[ $mode == --check ]]; then
    stop_server
else
    show_next
fi
finished=true
