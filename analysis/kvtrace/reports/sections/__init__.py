"""The sections of a report, one a file. A new file here is a new section: see `kvtrace.reports.registry`."""
