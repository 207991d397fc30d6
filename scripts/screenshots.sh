#!/usr/bin/env bash
# Pictures of reports, for the README and the book, below 200 kB each.
#   scripts/screenshots.sh REPORT.html [PYTHON]             docs/src/images/report-{light,dark}.png: what a reader sees first
#   PART=training scripts/screenshots.sh REPORT.html [PYTHON]   docs/src/images/training-{light,dark}.png: that section alone
# Needs chromium; PYTHON has Pillow (scripts/requirements-peers.txt). HEIGHT crops.
set -euo pipefail
cd "$(dirname "$0")/.."
report=$(realpath "$1")
python=${2:-python3}
browser=${CHROMIUM:-chromium}
images=docs/src/images
part=${PART:-report}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$images"

width=1180 height=${HEIGHT:-1400} scale=1.5
if [ "$part" != report ]; then
  height=${HEIGHT:-1130} scale=1
  "$python" - "$report" "$work/part.html" "$part" <<'PY'
import sys
from pathlib import Path

page, part = Path(sys.argv[1]).read_text(), sys.argv[3]
start = page.find(f'<section id="{part}">')
if start < 0:
    sys.exit(f"{sys.argv[1]}: no section `{part}`")
end = page.index("</section>", start) + len("</section>")
head = page[: page.index("<main>")].replace("</style>", "h2 { margin-top: 0; } main { padding-top: 24px; }\n</style>")
Path(sys.argv[2]).write_text(f"{head}<main>{page[start:end]}</main></body></html>")
PY
  report=$work/part.html
fi
for theme in light dark; do
  scheme=$([ "$theme" = dark ] && echo 0 || echo 1)
  "$browser" --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update \
    --disable-sync --hide-scrollbars --user-data-dir="$work/profile-$theme" --blink-settings=preferredColorScheme="$scheme" \
    --force-device-scale-factor=$scale --window-size=$width,"$height" --screenshot="$work/$theme.png" "file://$report" 2>"$work/log" \
    || { cat "$work/log" >&2; exit 1; }
  "$python" - "$work/$theme.png" "$images/$part-$theme.png" <<'PY'
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
