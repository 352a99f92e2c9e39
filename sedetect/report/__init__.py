"""sedetect report: what the commands measured of a model, as one HTML page and as figures.

evidence.py reads a folder, numbers.py computes what no other module gives, data.py lists what charts.py draws,
sections.py words what page.py lays out. Drawing needs the extra: pip install 'sedetect[report]'.
"""
