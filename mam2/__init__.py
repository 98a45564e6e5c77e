"""MAM2: masked appearance-motion modeling. `mam2.engine` trains, `mam2.kernels` holds the fused operators.

In the repository `engine` and `kernels` beside this file are links to the folders of the same names.
"""

from __future__ import annotations

__version__ = "0.1.0"
