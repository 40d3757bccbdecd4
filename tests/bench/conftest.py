"""The suite is part of the checkout, not of the installed package: it is imported from here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
