"""``ds-looksam verify`` for the launch scripts, which start a file: is it right on these hosts and their network?

    bash launch/ssh.sh --hostfile hosts --program launch/verify.py -- --folder /a/folder/that/all/hosts/see
"""

import sys

from ds_looksam.cli import main

local_rank = [option for option in sys.argv[1:] if option.startswith("--local_rank")]  # deepspeed adds it in front
sys.exit(main([*local_rank, "verify", *(option for option in sys.argv[1:] if option not in local_rank)]))
