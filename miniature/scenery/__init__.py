"""What the miniature world is made of: scenes, shapes, styles, captions and their vocabulary."""
