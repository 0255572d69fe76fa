"""Tests. Shapes are checked while they run: `--jaxtyping-packages=interp,tests.check`."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
