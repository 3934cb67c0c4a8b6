"""The public names of the reports: the one list, read by the lazy import too."""

from .continual import continual_figure as continual_figure
from .continual import continual_table as continual_table
from .page import write as write
from .routing import routing_figure as routing_figure
from .routing import routing_table as routing_table
from .run import read_results as read_results
from .table import families as families
from .table import insert as insert
from .table import table as table
