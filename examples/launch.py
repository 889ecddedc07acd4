"""Start the local server from a script: the same as `aq-data serve`, with the same flags."""

import sys

from aq_server.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
