"""Report pages of trials: a folder of self-contained files, and a small server that only reads it."""

from pullback.lab.report.markdown import methods_table
from pullback.lab.report.pages import write_report
from pullback.lab.report.server import ReportServer, serve

__all__ = ["ReportServer", "methods_table", "serve", "write_report"]
