"""Votes of people on pairs of candidate videos: the queue of each annotator, the store of votes, the page, what comes out."""
