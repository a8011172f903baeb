"""Every error a user can meet, worded once.

Each names the argument, its value and the remedy, and is raised before anything is changed. The
exception types are those of torch.nn where torch.nn raises one, and its key phrases are kept, so
that code which matches on them goes on working.
"""

from .activation import *  # noqa: F403
from .layers import *  # noqa: F403
from .masks import *  # noqa: F403
from .models import *  # noqa: F403
from .policy import *  # noqa: F403
from .processes import *  # noqa: F403
from .tracing import *  # noqa: F403
