"""Reports: what a trace tells, as one offline page or a chart of it.

`charts.py` draws figures, `page.py` makes one HTML file of sections, `registry.py` knows the sections (one file each in
`sections/`), `run.py` is what they ask, `compose.py` puts a report together.
"""
