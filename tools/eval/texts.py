#!/usr/bin/env python3
"""Write the texts that `redraft bench --quality` reads, from the folder that tools/train/prepare.py filled.

    python3 texts.py WORK/data TEXTS

TEXTS/human.txt: the documents that no training saw; TEXTS/train.txt: all the others. Documents are separated by a line
`<|endoftext|>`. `--parts stories` keeps the parts of a corpus apart.
"""
import argparse
import os

import numpy as np
from tokenizers import Tokenizer

SEPARATOR = "\n<|endoftext|>\n"


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("data", help="folder with data.npz and tokenizer.json")
    ap.add_argument("out", help="folder to write human.txt and train.txt to")
    ap.add_argument("--human-parts", default="stories", help="parts whose held-out documents are the human text")
    ap.add_argument("--train-parts", default="stories,tales,children", help="parts that count as training text")
    args = ap.parse_args()
    tokenizer = Tokenizer.from_file(os.path.join(args.data, "tokenizer.json"))
    with np.load(os.path.join(args.data, "data.npz")) as data:
        tokens, starts, parts = data["tokens"], data["doc_start"], list(data["parts"])
        part, heldout = data["doc_part"], data["doc_heldout"]
    os.makedirs(args.out, exist_ok=True)
    for name, wanted, held in (("human", args.human_parts, True), ("train", args.train_parts, False)):
        ids = [parts.index(p) for p in wanted.split(",")]
        chosen = np.flatnonzero(np.isin(part, ids) & (heldout == held))
        # The first id of a document is the separator itself.
        documents = tokenizer.decode_batch([tokens[starts[i] + 1:starts[i + 1]].tolist() for i in chosen])
        path = os.path.join(args.out, name + ".txt")
        with open(path + ".tmp", "w") as f:
            f.write(SEPARATOR.join(documents) + "\n")
        os.replace(path + ".tmp", path)
        print(f"{path}: {len(documents)} documents")


if __name__ == "__main__":
    main()
