"""The report: one HTML page that shows what a corpus holds, for people who have nothing but a browser."""
