"""Networks of the course trained on one data set, measured and compared: what `fastconv compare` does.

`networks` says what is compared, `measure` how, `study` in which parts; `report` writes the page from `figures` and
`text`. Needs the extra "demo".
"""

from fastconv.compare.networks import NETWORKS
from fastconv.compare.report import overview, write_report
from fastconv.compare.study import Plan, Results, Study

__all__ = ["NETWORKS", "Plan", "Results", "Study", "overview", "write_report"]
