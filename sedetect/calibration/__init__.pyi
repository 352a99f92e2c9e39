from .texts import DOMAINS as DOMAINS
from .texts import Document as Document
from .texts import load_texts as load_texts
from .windows import Calibration as Calibration
from .windows import Windows as Windows
from .windows import batches as batches
from .windows import make_windows as make_windows
from .windows import prefix_ids as prefix_ids
