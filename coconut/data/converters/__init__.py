"""Public data sets -> our records; `launch/prepare_data.py` is their command line.

    files or hub --sources--> rows --visual | textual | columns--> Samples --write--> SPLIT.json + images/

Each converter is a generator from rows (dictionaries in the public layout) to Samples, and names the sample it cannot
take in a DataError.
"""
