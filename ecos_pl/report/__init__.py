"""``report.html``: a finished run on one page, for readers who did not run it.

The page is a pure function of the run folder: `read_run` gathers, the sections say it in plain
words, `page.html.jinja` lays it out. ``python -m ecos_pl.report RUN_FOLDER`` writes it anew.
"""

from ecos_pl.report.page import report_html, write_report

__all__ = ["report_html", "write_report"]
