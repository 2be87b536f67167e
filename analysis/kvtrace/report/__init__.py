"""Reports: `charts.py` makes figures of frames, `page.py` one offline HTML file of sections."""
