"""What the report says and how it looks: findings from the results on disk, tables, pictures, pages."""
