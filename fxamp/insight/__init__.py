"""What a converted module tells about itself."""

from fxamp.insight.report import Report, report_of

__all__ = ["Report", "report_of"]
