"""What a run did: a log, a table for the terminal, one self-contained page."""

from jaxprune.report.page import append_metrics as append_metrics
from jaxprune.report.page import read_metrics as read_metrics
from jaxprune.report.page import table as table
from jaxprune.report.page import truncate_metrics as truncate_metrics
from jaxprune.report.page import write_html as write_html
