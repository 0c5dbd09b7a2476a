"""``python -m stream3r_ros`` is the ``stream3r`` command."""

import sys

from stream3r_ros.cli import main

sys.exit(main())
