"""One page of HTML about one run or several."""

from lightning_graphon.report.report import write_report

__all__ = ["write_report"]
