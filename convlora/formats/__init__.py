"""Forms of a trained segmenter for other programs; each is written as a folder that explains itself."""
