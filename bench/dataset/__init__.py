"""A study of many clips: read a data set, edit it on many machines, score and show the results."""
