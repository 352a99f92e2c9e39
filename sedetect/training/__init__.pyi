from .checkpoints import follow as follow
from .histories import History as History
from .histories import Timeline as Timeline
from .histories import timeline as timeline
from .monitor import ExpertMonitor as ExpertMonitor
from .series import Series as Series
from .series import State as State
