"""sedetect report: what the commands measured of a model, as one HTML page and as figures.

evidence.py reads a folder, numbers.py computes what no other module gives, data.py lists what charts.py draws,
pictures.py what analyses.py draws, sections.py and experiments.py word what page.py lays out. Drawing needs the extra:
pip install 'sedetect[report]'. Nothing here runs a model or judges an expert.
"""
