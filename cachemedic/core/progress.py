"""Progress bars: widgets in JupyterLab, text in a terminal and under make, which passes text of a notebook on."""

import os

if "CACHEMEDIC_RUN" in os.environ:
    from tqdm import tqdm
else:
    from tqdm.auto import tqdm

__all__ = ["tqdm"]
