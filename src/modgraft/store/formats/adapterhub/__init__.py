"""The folders of AdapterHub's ``adapters``: what reads them and what writes them."""
