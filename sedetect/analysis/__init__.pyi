from .common import Analysis as Analysis
from .outputs import analyze_outputs as analyze_outputs
from .routing import analyze_routing as analyze_routing
from .weights import analyze_weights as analyze_weights
