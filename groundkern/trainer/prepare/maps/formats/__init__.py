"""Annotation formats, one module each: what a tool wrote, as records of labelled places.

A module has `opened(options) -> Annotations`. Its records are `{"image", "label", "places"}`, as
`groundkern.trainer.prepare.maps.annotated` takes them; what is no place is `Unusable`, with a
`kind` if it is passed over by intent.
"""
