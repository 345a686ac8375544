#!/usr/bin/env bash
# Runs every example at toy size on a tiny random model: bash examples/run_toy.sh [python]. CI calls it.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$python" -m tests.tiny "$scratch/model"
toy() {
  echo "-- $*"
  "$python" "$@" > "$scratch/log" 2>&1 || { cat "$scratch/log"; exit 1; }
}
toy examples/support_tickets/demo.py --model "$scratch/model" --rows 6 --output "$scratch/demo"
toy -m fastpt train examples/support_tickets/support_tickets.toml model="$scratch/model" max_steps=2 output="$scratch/toml"
toy examples/pretrain_on_docs.py --model "$scratch/model" --steps 2 --output "$scratch/pretrain"
toy examples/own_objective.py --model "$scratch/model" --steps 2 --output "$scratch/own"
toy examples/drop_in_trl.py --model "$scratch/model" --steps 2 --output "$scratch/trl"
for word in red green blue one two; do echo "{\"prompt\": \"$word cat\", \"chosen\": \"$word\", \"rejected\": \"dog\"}"; done > "$scratch/pairs.jsonl"
for objective in dpo kto reward; do
    toy examples/preferences.py --objective $objective --model "$scratch/model" --data "$scratch/pairs.jsonl" --output "$scratch/$objective"
done
toy examples/rlhf.py --model "$scratch/model" --data "$scratch/pairs.jsonl" --steps 2 --new-tokens 8 --output "$scratch/rlhf"
for n in 1 2 3 4 5 6 7 8 9; do echo "{\"question\": \"red $n\", \"answer\": \"blue\"}"; done > "$scratch/sums.jsonl"
toy examples/distill.py --model "$scratch/model" --data "$scratch/sums.jsonl" --rows 6 --output "$scratch/distill"
"$python" -m tests.tiny "$scratch/encoder" bert
"$python" -m tests.tiny "$scratch/translator" bart
for n in 1 2 3 4 5 6 7 8; do for m in 1 2 3 4 5 6 7 8; do echo "the red cat $n of $m"; done; done | gzip > "$scratch/en.gz"
for n in 1 2 3 4 5 6 7 8; do for m in 1 2 3 4 5 6 7 8; do echo "die rote Katze $n von $m"; done; done | gzip > "$scratch/de.gz"
toy examples/translate.py --model "$scratch/translator" --source "$scratch/en.gz" --target "$scratch/de.gz" --rows 20 --output "$scratch/translate"
toy examples/adapt_language.py --model "$scratch/model" --new "$scratch/de.gz" --old "$scratch/en.gz" --held-out 1 --rows 4 --added-tokens 2 --output "$scratch/language"
echo '{"train": [["pay my bill", "pay"], ["will it rain", "weather"]], "test": [["rain", "weather"]]}' > "$scratch/intents.json"
toy examples/classify_intents.py --model "$scratch/encoder" --data "$scratch/intents.json" --epochs 1 --output "$scratch/intents"
toy -m fastpt merge "$scratch/toml" "$scratch/merged"
echo "all examples ran"
