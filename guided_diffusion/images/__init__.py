"""Files to arrays and back: decoding, DICOM, geometry, grey levels, masks."""
