#!/usr/bin/env bash
# Pictures of a report in light and dark, for the README and the book: docs/src/images/report-{light,dark}.png, below 200 kB each.
#   scripts/screenshots.sh REPORT.html [PYTHON]       needs chromium; PYTHON has Pillow (scripts/requirements-peers.txt)
set -euo pipefail
cd "$(dirname "$0")/.."
report=$(realpath "$1")
python=${2:-python3}
browser=${CHROMIUM:-chromium}
images=docs/src/images
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$images"

# The head of the page down to its plots: what a reader sees first.
width=1180 height=${HEIGHT:-1400}
for theme in light dark; do
  scheme=$([ "$theme" = dark ] && echo 0 || echo 1)
  "$browser" --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update \
    --disable-sync --hide-scrollbars --user-data-dir="$work/profile-$theme" --blink-settings=preferredColorScheme="$scheme" \
    --force-device-scale-factor=1.5 --window-size=$width,"$height" --screenshot="$work/$theme.png" "file://$report" 2>"$work/log" \
    || { cat "$work/log" >&2; exit 1; }
  "$python" - "$work/$theme.png" "$images/report-$theme.png" <<'PY'
import sys
from pathlib import Path
from PIL import Image

source, target = map(Path, sys.argv[1:])
# A palette is enough for type and flat colours, and a quarter of the size.
Image.open(source).convert("RGB").quantize(colors=96, dither=Image.Dither.NONE).save(target, optimize=True)
size = target.stat().st_size
print(f"{target}: {size / 1000:.0f} kB")
if size > 200_000:
    sys.exit(f"{target}: too large for a README; lower HEIGHT")
PY
done
