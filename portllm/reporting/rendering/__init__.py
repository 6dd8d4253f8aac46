"""How the pages look: findings and sections as Markdown, HTML, SVG, JSON and CSV.

    pages.py    the report and the page of costs, as Markdown and HTML
    charts.py   the pictures, one function each
    drawing.py  palette, markers, axes, and SVG without dates
    exports.py  metrics.json and the CSV files that DVC reads

templates/ has the Markdown, the HTML and the style of a page.
"""
