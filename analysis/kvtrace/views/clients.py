"""`clients`: whose request each one is.

The tenant is what `requests` has as a number, as `kvtrace stats --by tenant` writes it. The client's part of a request
id is what the engine and its front end did not add (`kvtrace.clients`, whose pattern this is).
"""

from __future__ import annotations

from kvtrace.clients import PATTERN
from kvtrace.views.declare import ENGINE, REQUEST, View
from kvtrace_traces.schema import Column

_GROUPS = ", ".join(f"nullif(regexp_extract(request_id, '{PATTERN}', {group}), '')" for group in (1, 2, 3))

VIEW = View(
    "clients",
    "one row per request, to be joined with others by `request` and grouped by",
    (
        ENGINE,
        REQUEST,
        Column("tenant", "str", "", "keyed hash of LoRA adapter and cache salt, 16 hexadecimal digits; `none` for "
               "neither"),
        Column("client", "str", "", "the client's part of the request id", True),
    ),
    ("requests",),
    f"""
SELECT {{key}}, request, CASE WHEN tenant = 0 THEN 'none' ELSE format('{{:016x}}', tenant) END AS tenant,
       coalesce({_GROUPS}, request_id) AS client
FROM requests
""",
)  # fmt: skip
