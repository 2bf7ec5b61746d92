"""Scans with geometry: reading NIfTI, MHA, NRRD and DICOM into one form."""
