"""GSM8K to parquet: train.parquet (7,473 rows) and test.parquet (1,319), ready for steepest.trainer.main_ppo.

python examples/data_preprocess/gsm8k.py --local_save_dir ~/data/gsm8k
python examples/data_preprocess/gsm8k.py --local_save_dir ~/data/gsm8k --hub modelscope
python examples/data_preprocess/gsm8k.py --local_save_dir ~/data/gsm8k --local_dataset_path FOLDER_WITH_JSONL
"""

from __future__ import annotations

import argparse
import sys

from steepest.data.prepare.gsm8k import HUBS, prepare_gsm8k
from steepest.errors import SteepestError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_save_dir", default="~/data/gsm8k", help="folder to write to (default: %(default)s)")
    parser.add_argument(
        "--local_dataset_path",
        help="folder with the original train.jsonl and test.jsonl, or one of them; no network then",
    )
    parser.add_argument(
        "--hub",
        choices=HUBS,
        help="where to fetch from (default: huggingface; modelscope with VERL_USE_MODELSCOPE=True in the environment)",
    )
    options = parser.parse_args()
    try:
        written = prepare_gsm8k(options.local_save_dir, options.local_dataset_path, options.hub)
    except SteepestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2  # the exit code of every command for errors that the user can fix
    for file in written.values():
        print(f"wrote {file.path} ({file.num_rows:,} rows)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
