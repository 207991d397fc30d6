"""Text for the tiny decoder: King James Bible, Linux manual pages and WordNet glosses, from Debian packages.

    apt-get install bible-kjv bible-kjv-text manpages manpages-dev wordnet-base groff
    python scripts/tiny/corpora.py DIR

Writes DIR/{kjv,man,wordnet}.train.jsonl, one document per line (a chapter, a page, fifty neighbouring glosses). Documents are held out
by the rule of `refit_data::corpus::part_of`, on the same names; what refit holds out lies in assets/text.
"""

import argparse
import gzip
import hashlib
import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def trains(name):
    """SHA-256 of the name modulo 40: 0 and 1 evaluate, 2 calibrates, the rest trains."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 40 > 2


def kjv():
    """Chapters: `Ge1:1 In the beginning...` lines grouped by book and chapter, the verse references dropped."""
    lines = subprocess.run(["bible", "-f", "Gen1:1-Rev22:21"], capture_output=True, text=True, check=True).stdout.splitlines()
    chapters = {}
    for line in lines:
        found = re.match(r"(\d?[A-Za-z]+\d+):\d+ (.*)", line)
        if found:
            chapters.setdefault(found[1], []).append(found[2])
    return [(f"kjv/{name}", "\n".join(verses)) for name, verses in chapters.items()]


def man():
    """Pages of the Linux man-pages project, rendered without hyphenation or justification, indentation removed."""
    listed = subprocess.run(["dpkg", "-L", "manpages", "manpages-dev"], capture_output=True, text=True, check=True).stdout
    files = sorted(Path(f) for f in listed.split() if re.fullmatch(r"/usr/share/man/man\d\w*/.+\.gz", f))

    def render(path):
        if not path.is_file() or path.is_symlink():
            return None
        source = gzip.decompress(path.read_bytes())
        if b".SH" not in source:  # a link to another page
            return None
        command = ["groff", "-t", "-mandoc", "-Tascii", "-P-cbou", "-rLL=100n", "-rHY=0", "-dAD=l"]
        text = subprocess.run(command, input=source, capture_output=True).stdout.decode("ascii", "replace")
        lines = [re.sub(r" {2,}", " ", line.strip()) for line in text.splitlines()]
        return f"man/{path.name}", re.sub(r"\n{3,}", "\n\n", "\n".join(lines[1:-1])).strip()

    with ThreadPoolExecutor(2) as pool:
        return [page for page in pool.map(render, files) if page]


def wordnet():
    """`lemma, lemma: gloss` lines in the order of WordNet's files, where neighbours are related."""
    documents = []
    for part in ("noun", "verb", "adj", "adv"):
        lines = []
        for line in Path(f"/usr/share/wordnet/data.{part}").read_text().splitlines():
            if line.startswith("  "):  # the licence
                continue
            fields, gloss = line.split(" | ", 1)
            fields = fields.split()
            lemmas = [re.sub(r"\(.+\)$", "", w).replace("_", " ") for w in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
            lines.append(f"{', '.join(lemmas)}: {gloss.strip()}")
        documents += [(f"wordnet/{part}{i}", "\n".join(lines[i : i + 50])) for i in range(0, len(lines), 50)]
    return documents


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path)
    out = parser.parse_args().dir
    out.mkdir(parents=True, exist_ok=True)
    for corpus, make in (("kjv", kjv), ("man", man), ("wordnet", wordnet)):
        documents = [{"name": name, "text": text} for name, text in make() if trains(name)]
        with open(out / f"{corpus}.train.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(d, ensure_ascii=False) + "\n" for d in documents)
        print(corpus, len(documents), "documents,", sum(len(d["text"]) for d in documents), "characters")


if __name__ == "__main__":
    main()
