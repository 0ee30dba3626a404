"""What the tokenizer learns from some fifty real images, and what its parts contribute to that.

    python benchmarks/learn.py tokenizer --images FOLDER --work FOLDER [--steps N]
    python benchmarks/learn.py vit --images FOLDER --work FOLDER [--steps N]
    python benchmarks/learn.py folds --images FOLDER --work FOLDER [--deals N]
    python benchmarks/learn.py ablation --images FOLDER --work FOLDER [--minutes N] [--seeds N]

- `tokenizer`: trains preset `small`, measures it on the held-out subjects beside patches painted in their mean
  colour, and draws its curves.
- `vit`: trains the ViT of preset `small` on that tokenizer, and compares its loss with that of the best
  constant prediction, and what classifiers learn from its features with what they learn from those of the
  untrained network and from pixels, on many draws of subjects.
- `folds`: the same for subjects that neither ViT nor tokenizer has seen, by training both anew for each fold;
  subjects are dealt to folds as often as --deals says.
- `ablation`: short trainings that differ in one thing (benchmarks/learning/ablation.py), one seed after the
  other, so that all arms have some seeds whenever it is stopped. What is done is not done again.

FOLDER of --images holds the images of benchmarks/learning/images.csv. Pictures, curves and tables go to --out
(default: WORK/results). One thread, unless OMP_NUM_THREADS says more.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

# This file's own folder comes first otherwise, and it holds a `catalog` as well.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.learning.ablation import run_arms, write_arms
from benchmarks.learning.corpus import build
from benchmarks.learning.study import study, vit_study
from benchmarks.learning.worth import drawn_subjects, unseen_subjects


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["tokenizer", "vit", "folds", "ablation"])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="corpus and runs; a second call goes on there")
    parser.add_argument("--out", type=Path, help="default: results/ in --work")
    parser.add_argument("--steps", type=int, help="default: as the preset")
    parser.add_argument("--deals", type=int, default=1, help="of the subjects to folds")
    parser.add_argument("--minutes", type=float, default=10.0, help="of CPU for each run of the ablation")
    parser.add_argument("--seeds", type=int, default=3, help="of every arm of the ablation")
    options = parser.parse_args()
    corpus = build(options.images, options.work)
    out = options.out or options.work / "results"
    out.mkdir(parents=True, exist_ok=True)
    if options.part == "tokenizer":
        study(corpus, options.work / "small", out, options.steps)
    elif options.part == "vit":
        vit_study(corpus, options.work / "small", options.work / "vit", out, options.steps)
        drawn_subjects(corpus, options.work / "vit", options.work / "frozen-features", out)
    elif options.part == "folds":
        unseen_subjects(corpus, options.work / "folds", out, options.deals)
    else:
        runs = options.work / "ablation"
        run_arms(corpus, runs, minutes=options.minutes, seeds=range(1, options.seeds + 1))
        write_arms(runs, out)


if __name__ == "__main__":
    main()
