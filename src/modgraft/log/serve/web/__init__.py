"""The parts of the website: notes as HTML, templates, style sheet, and access control."""
