"""What the page is made of: notes as HTML, the templates, the style, the guard at the door."""
